"""The study: every idea of the four papers, trained alike on one corpus, timed in turns, and told in one table."""

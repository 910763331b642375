"""From speech to features: audio files in, log-mel frames out."""

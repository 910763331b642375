"""The targets of edgefuse: one module per runtime; each satisfies `edgefuse.target.Target`. See targets/README.md."""

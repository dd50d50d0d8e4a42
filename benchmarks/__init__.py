"""The harness: what is run, where, and what it says. It imports ``pof``, never the reverse."""

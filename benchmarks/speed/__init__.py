"""The performance suite: this project beside what its users would pick instead, and its limits."""

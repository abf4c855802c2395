"""What a running system says about itself in numbers: counts, their names, Prometheus text, and reading it again. Never contents."""

"""Where masks and their images come from: one-time pads."""

"""What crosses the trust boundary: messages, the channel, addresses, keys and limits."""

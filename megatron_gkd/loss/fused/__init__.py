"""The loss from hidden states, in chunks of tokens."""

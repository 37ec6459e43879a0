"""The commands but train and eval: one file each."""

"""The commands, one file each; train and eval are in train/."""

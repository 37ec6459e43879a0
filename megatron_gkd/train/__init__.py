"""Training: the loss contract, the student with its optimizer, one step, the loop, checkpoints and evaluation."""

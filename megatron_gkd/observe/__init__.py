"""What a run says about itself: messages, sums and counts of metrics, times, a progress line, files for other tools.

logging    rank-aware messages          metrics    (sum, count) per name, one collective
timers     seconds per phase            progress   step, loss, tokens/s, ETA
writers    JSONL, TensorBoard, wandb    events     starts, warnings, ends
"""

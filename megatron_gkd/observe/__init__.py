"""What a run reports about itself: messages, metrics, times, a progress line, files for other tools.

logging    rank-aware messages          metrics    (sum, count) per name, one collective
timers     seconds per phase            progress   step, loss, tokens/s, ETA
writers    JSONL, TensorBoard, wandb    events     starts, warnings, ends
"""

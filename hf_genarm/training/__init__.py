"""Training, on top of TRL's `RewardTrainer`."""

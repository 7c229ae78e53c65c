"""Training of autoregressive reward models, on top of TRL's `RewardTrainer`."""

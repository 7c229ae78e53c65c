"""What is published: the weights of a reward model, what is recorded about them, and the rewards that they give."""

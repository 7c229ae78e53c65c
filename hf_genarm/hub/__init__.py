"""What is published: weights, what they say about themselves, and the rewards that they give."""

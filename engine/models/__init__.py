"""What training and serving of vector models share: features, encoded rows, and the towers in NumPy. No torch."""

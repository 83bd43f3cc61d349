"""Parts that every decoder is made of."""

"""The runs behind claims, their rows of results, and the tables made of them; needs the checkout."""

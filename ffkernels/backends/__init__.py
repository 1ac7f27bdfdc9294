"""The implementations behind the operators; `select` chooses among them."""

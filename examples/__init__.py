"""Scripts that make the models this repository is shown and measured with."""

"""Studies: methods × hyperparameters × seeds on the same data. A study owns its search, its workers and its report."""

"""Methods × hyperparameters × seeds on the same data: what is compared, how points are searched, who runs them."""

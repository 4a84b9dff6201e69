"""An adversarial autoencoder, a data set of waves and a metric for genfuse."""

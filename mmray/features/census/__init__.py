"""The census: every neuron's contribution to every noun of a data set, ranked; and its refresh as the data grows."""

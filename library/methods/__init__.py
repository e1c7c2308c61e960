"""One file per training method: what is trained, with which loss, how it is saved."""

"""Ground floor: contracts, columns, kernels and the merge. Pure: no files, no network."""

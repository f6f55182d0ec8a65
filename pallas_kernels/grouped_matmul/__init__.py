"""Each group of rows times its expert's matrix: `api.grouped_matmul`."""

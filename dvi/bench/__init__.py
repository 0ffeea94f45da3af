"""Finding out honestly how good it is: Spec-Bench, rivals in the same process, and reports in the harness's format."""

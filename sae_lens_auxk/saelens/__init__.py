"""What fits SAELens's runs, trainers and files to this package's SAEs, and theirs to SAELens."""

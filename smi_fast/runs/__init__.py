"""Long jobs: the folder that they write to and go on from, the processes that share them, and signals that end them."""

"""The page that says what a run did: its parts, from reading the run's files to charts and sections."""

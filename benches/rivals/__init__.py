"""What others offer for the same task, each in the form that is fastest here."""

"""What a report is made of: the files of a run, its history, the verdicts on it, and the page."""

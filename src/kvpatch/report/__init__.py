"""One self-contained HTML file that says what a run shows, and what it does not. Never imports torch."""

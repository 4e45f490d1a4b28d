"""What a browser is shown: the console, the API's document."""

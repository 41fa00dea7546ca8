"""Will it fit, how long will it take, and what will it cost? Answered without a GPU and without weights."""

"""`python -m stem.evaluate`: lm-eval's command line with the model name `stem`."""

from stem.evaluate import main

main()

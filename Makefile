# The commands of this repository, by the name one guesses.

.PHONY: help setup check test format pico walk

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup:  ## the environment: .venv, or what is active
	bash scripts/setup_env.sh dev

check:  ## linters and types, no tests
	bash -c 'source scripts/setup_env.sh && setup_env dev && pre-commit run --all-files'

test:  ## everything continuous integration runs
	bash scripts/test.sh

format:  ## mend formatting and the simple mistakes
	bash -c 'source scripts/setup_env.sh && setup_env dev && ruff check --fix . ; ruff format .'

pico:  ## the whole walk on a pico model, in under a minute
	bash scripts/pico.sh

walk:  ## the whole walk on a real model
	bash scripts/prune_llama.sh

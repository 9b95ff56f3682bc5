"""Lightning's side: strategy, modules, data module, optimisation, callbacks."""

"""How well each attribution predicts real interventions: docs/faithfulness_data.md."""

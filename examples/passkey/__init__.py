"""The passkey study: contexts, models, training and evaluation behind train_niah.py and eval_niah.py."""

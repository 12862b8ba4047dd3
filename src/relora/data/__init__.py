"""Data: text to documents, documents to token ids, ids to batches in an order that is a function of the step.

`config` holds the settings, `prepare` makes (or finds again) the token files, `batches` reads them.
"""

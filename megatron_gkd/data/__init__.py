"""From data set files to what a model is fed: tokenisation (chat), files and rows, the order of rows, and collation.

files    JSONL and Parquet records, with the place each came from
chat     tokenizers, chat templates -> (prompt ids, completion ids)
rows     records -> tokenised rows, policies for bad and overlong ones, a summary
sampler  which rows a step sees: stateless and resumable
collate  samples -> one micro-batch of tensors
"""

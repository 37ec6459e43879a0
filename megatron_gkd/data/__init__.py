"""From data set files to what a model is fed: tokenisation (chat), files and rows, the order of rows, and collation.

files          JSONL, Parquet and saved data sets: records in order, with the place each came from
random_access  the same records by number, over an index
forms          a record's columns -> prompt and completion, and which turns carry the loss
turns          one turn, whatever wrote it
columns        what stands beside the turns: tools, variables, marks
left_out       the parts of a row that its chat template does not use
chat           tokenizers, chat templates -> (prompt ids, completion ids)
stop_tokens    where a completion ends
dataset        the interface of training rows
policy         what happens to a malformed or overlong record, and the counts
rows           records -> tokenised rows as flat arrays
row_file       the same arrays in a file that the ranks of a machine map
row_key        its name: a hash of all that decides the rows
streaming      the same rows, read and tokenised on access
order          which rows a step sees, also from several sets with weights: stateless and resumable
collate        samples -> one micro-batch of tensors
second_reading a record read by other code than the one that makes rows
show           a row as text, with marks for what is trained on
prompts        prompts for sampling to a file, and the rows of that file
result_file    a JSONL file that survives its writer
"""

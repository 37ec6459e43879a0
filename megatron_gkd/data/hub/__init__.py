"""Models and data sets on a hub: their files are fetched once, verified, and kept in the hub's own cache.

    places.py      caches, endpoint, offline mode, as the hub's own client reads them
    listing.py     the files of a repository at a commit, with sizes and hashes; kept, so that a pin needs no network
    huggingface.py requests to Hugging Face's hub: the commit of a revision, a listing, files
    modelscope.py  the same for ModelScope
    snapshot.py    files that are there, whole and as listed
    splits.py      which files of a data set's repository are the split that was asked for
    rows.py        a data set's files as the one file that `--dataset` takes, with the rows that were drawn

One process, and no ranks: those agree in train/hub_files.py. Nothing that arrives is executed: of a model its
safetensors, configs and tokenizer files are fetched (weights/hub_models.py), of a data set rows.
"""

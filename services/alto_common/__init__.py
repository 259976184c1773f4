"""What admission, placement and training share: vocabulary, configuration, errors, authentication, storage, start-up.

Nothing here may import a service.
"""

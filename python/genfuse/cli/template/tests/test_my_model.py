from my_model import MyModel

from genfuse.testing import check_model


def test_it_keeps_the_contract_of_genfuse_models() -> None:
    check_model(MyModel)


def test_it_keeps_it_with_other_settings() -> None:
    check_model(MyModel, latent_dim=2, hidden=(32,))

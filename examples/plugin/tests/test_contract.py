from genfuse_aae.model import AAE
from genfuse_aae.waves import waves

from genfuse.testing import check_dataset, check_model


def test_the_model_keeps_the_contract():
    check_model(AAE)


def test_the_data_set_keeps_the_contract():
    check_dataset(waves)

#pragma once
#include "portable.h"

// z = mu + sigma eps and KL(N(mu, sigma^2) || N(0, 1)), with logvar = ln sigma^2.
namespace genfuse::reparameterize_kl {

template <class T>
GENFUSE_HD T sigma(T logvar) {
  return exp_(T(0.5) * logvar);
}

template <class T>
GENFUSE_HD T sample(T mu, T sigma, T eps) {
  return mu + sigma * eps;
}

template <class T>
GENFUSE_HD T kl(T mu, T logvar, T sigma) {
  return T(0.5) * (mu * mu + sigma * sigma - T(1) - logvar);
}

template <class T>
struct Grad {
  T mu, logvar;
};

// From the sums over samples of gz and gz eps. The order of the factors keeps a finite gradient finite where sigma^2
// overflows, also for gkl = 0.
template <class T>
GENFUSE_HD Grad<T> grad(T gz, T gz_eps, T gkl, T mu, T sigma) {
  return {gz + gkl * mu, T(0.5) * (gz_eps * sigma + ((gkl * sigma) * sigma - gkl))};
}

}  // namespace genfuse::reparameterize_kl

// Marks functions that host and device share.
#ifndef JAX_DEEPEP_INTERFACE_HOST_DEVICE_H_
#define JAX_DEEPEP_INTERFACE_HOST_DEVICE_H_

#ifdef __CUDACC__
#define JAX_DEEPEP_HOST_DEVICE __host__ __device__
#else
#define JAX_DEEPEP_HOST_DEVICE
#endif

#endif  // JAX_DEEPEP_INTERFACE_HOST_DEVICE_H_

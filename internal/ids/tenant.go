package ids

import "errors"

// A tenant's ids have its name and a slash before them: "shop/alice". The name has no slash, so the first one
// of such an id ends it, and no id of one tenant is that of another.
const (
	// Separator ends the tenant of an id.
	Separator = '/'
	// MaxTenantBytes is the longest name of a tenant.
	MaxTenantBytes = 31
	// MaxScopedBytes is the longest id with its tenant before it, as Controllers and nodes see it.
	MaxScopedBytes = MaxTenantBytes + 1 + MaxBytes
)

// ErrTenant is what is wrong with a tenant's name.
var ErrTenant = errors.New("must be 1 to 31 of a-z, 0-9 and -, and not begin with -")

// TenantShare is how many of the places of all tenants, most of them and taken in use, one tenant may have: a quarter, and a fortieth once
// no more than a quarter is left. So some tenants leave room for the others. It is 1 at least.
func TenantShare(most, taken int) int {
	share := most / 4
	if taken >= most-share {
		share = most / 40
	}
	return max(share, 1)
}

// CheckTenant says what is wrong with a tenant's name: [a-z0-9][a-z0-9-]{0,30}. The error is ErrTenant.
func CheckTenant[Name string | []byte](name Name) error {
	if len(name) == 0 || len(name) > MaxTenantBytes || name[0] == '-' {
		return ErrTenant
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return ErrTenant
		}
	}
	return nil
}

// Scope is what a tenant's ids begin with, "" for no tenant.
func Scope(tenant string) string {
	if tenant == "" {
		return ""
	}
	return tenant + string(Separator)
}

// IsScope tells whether s is what the ids of some tenant begin with.
func IsScope(s string) bool {
	return len(s) > 1 && s[len(s)-1] == Separator && CheckTenant(s[:len(s)-1]) == nil
}

// Scoped tells whether an id begins as those of some tenant do.
func Scoped(id string) bool {
	for i := range min(len(id), MaxTenantBytes+1) {
		if id[i] == Separator {
			return CheckTenant(id[:i]) == nil
		}
	}
	return false
}

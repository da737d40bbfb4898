package node

import (
	"fmt"
	"strings"

	"github.com/push-manager/push-manager/internal/ids"
)

// Tenant is the customer that a session belongs to, "" where there are none. Push-Manager, the
// Controller and [Users] know a tenant's users and rooms by the ids of its callers with "<tenant>/"
// before them; clients are told of them without it. So two tenants may use the same ids.
//
// A gateway takes the tenant from what proves who the client is, never from what the client says, and
//
//   - adds the session to its Users as ID(user), and reports it by membership.Reporter.TenantMember,
//   - shows the client Plain(m.RoomID).
//
// Where there are tenants, a client without one must not have a user id, nor name a room, that begins
// as those of a tenant: it would be that tenant's. [Tenant.Allows] tells.
type Tenant string

// Check refuses a name that no tenant can have: it must be [a-z0-9][a-z0-9-]{0,30}. No tenant is fine.
func (t Tenant) Check() error {
	if t == "" {
		return nil
	}
	if err := ids.CheckTenant(string(t)); err != nil {
		return fmt.Errorf("tenant: %w", err)
	}
	return nil
}

// ID is the id of a user or room of the tenant as everybody but its clients and callers knows it.
func (t Tenant) ID(plain string) string { return ids.Scope(string(t)) + plain }

// Plain is an id as the clients of the tenant know it. One of somebody else stays as it is.
func (t Tenant) Plain(id string) string {
	if n := len(t); n > 0 && len(id) > n && id[n] == ids.Separator && strings.HasPrefix(id, string(t)) {
		return id[n+1:]
	}
	return id
}

// Allows tells whether a client of the tenant may have or name the id: whatever it is, it is the
// tenant's own. A client without a tenant may not where the id begins as those of a tenant do.
func (t Tenant) Allows(plain string) bool { return t != "" || !ids.Scoped(plain) }

package ingress

import (
	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
)

const presenceServiceName = "pubsub.PresenceService"

// presenceDesc is the generated description of PresenceService with handlers that take the bytes of a request.
func (s *Server) presenceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: presenceServiceName,
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: disconnect.String(), Handler: s.callHandler(disconnect, s.disconnect)}},
		Metadata:    pubsub.PresenceService_ServiceDesc.Metadata,
	}
}
